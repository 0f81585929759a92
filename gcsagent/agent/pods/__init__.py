"""Pods: containers that share namespaces, files and a cgroup with a sandbox container.

A pod is its sandbox: it has the sandbox's id, its files lie in the sandbox's directory, and it goes with it.
"""
