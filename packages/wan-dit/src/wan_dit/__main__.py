from wan_dit.cli import main

raise SystemExit(main())
