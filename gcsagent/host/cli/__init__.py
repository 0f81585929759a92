"""What gcsctl's commands do; :mod:`gcsagent.host.gcsctl` is the program."""
