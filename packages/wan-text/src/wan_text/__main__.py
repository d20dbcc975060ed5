from wan_text.cli import main

raise SystemExit(main())
