"""``network.*``: interfaces, addresses, routes, names and masquerading, of the guest and of containers.

The request says what shall be; :mod:`plan` compares it with what the kernel has and makes the steps from
one to the other, and nothing is written down: an agent killed half-way leaves a state that the same request,
sent again, goes on from. The tools are iproute2's ``ip`` and, for masquerading, ``nft``.
"""
