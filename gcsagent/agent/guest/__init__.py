"""The services of ``guest.*``: the machine itself, as against what runs in it."""
