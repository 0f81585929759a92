"""``python -m gcsagent.host`` is gcsctl."""

import sys

from gcsagent.host.gcsctl import main

sys.exit(main())
