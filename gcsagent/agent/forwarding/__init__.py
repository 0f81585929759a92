"""forward.*: connections of a host to what listens in the guest or in a container."""
