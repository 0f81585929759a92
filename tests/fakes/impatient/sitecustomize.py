"""Makes an agent that waits for nobody: put this folder, and the tree, on its module path."""

import os

if "GCS_GENERATION" in os.environ:
    from gcsagent.agent import process

    process.UNCLAIMED_SECONDS = 0.3
