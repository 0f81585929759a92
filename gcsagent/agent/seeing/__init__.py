"""What shows how the agent and its containers are doing: metrics, stacks, the log."""
