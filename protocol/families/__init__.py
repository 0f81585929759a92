"""The methods of the contract, one module per family: what each takes, what it answers."""
