from wan_train.cli import main

raise SystemExit(main())
