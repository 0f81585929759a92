"""Tar archives in and out of a directory tree that nobody here trusts, and neither the archive.

For the guest's archiver and for ``gcsctl cp``; knows nothing of agents and connections. Every name is looked
up step by step from the descriptor of a root directory (tree), so that no symlink, hard link, absolute name
or ``..`` leads out of it, whatever else happens in the tree meanwhile. tarfile knows the formats; what is
read and written, and how much of it, is decided here.
"""
