"""gcsctl's command line: what it accepts, what the commands do, what they print."""
