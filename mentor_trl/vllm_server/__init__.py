"""
What runs inside the vLLM servers and engines that hold a policy: who may ask them for what, their weights, and the
branching of mixed rollouts. Uses vLLM's extension points only, and no particular version of it.
"""
