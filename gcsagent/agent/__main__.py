"""The agent's process, started by the supervisor: ``python -m gcsagent.agent``."""

import gc
import sys

# What imports make stays: looking through it for garbage was a tenth of the agent's start.
gc.disable()

from gcsagent.agent.stdlib import load_later  # noqa: E402

load_later()

from gcsagent.agent.app import main  # noqa: E402

gc.freeze()
gc.enable()

sys.exit(main())
