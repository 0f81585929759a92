"""The host side: client, VM launcher and `gcsctl`. Not in the guest image; imports `protocol` only."""
