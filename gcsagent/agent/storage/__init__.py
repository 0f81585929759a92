"""``storage.*``: what is mounted in the guest on a host's behalf, by whom, and in which order."""
