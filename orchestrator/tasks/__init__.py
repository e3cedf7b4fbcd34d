"""What is trained: the ``Task`` protocol, and two built-in tasks on real data that need no download."""
