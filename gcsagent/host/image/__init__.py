"""Container images in files: an OCI layout, as a directory or a tar, or what ``docker save`` writes.

Nothing in an image is believed: every digest and size is checked, what it unpacks to is bounded, and no name
in a layer leads out of the tree it is unpacked to. The way of an image: reference (which one in which file),
store (its blobs), document (index, manifest, config), layer (decompressed and checked), tree (unpacked over
each other), cache (kept, by digest), settings (what its config makes of a container).
"""
