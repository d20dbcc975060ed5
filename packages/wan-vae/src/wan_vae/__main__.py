from wan_vae.cli import main

raise SystemExit(main())
