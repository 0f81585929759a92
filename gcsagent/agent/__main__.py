"""The agent's process, started by the supervisor: ``python -m gcsagent.agent``."""

import sys

from gcsagent.agent.app import main

sys.exit(main())
