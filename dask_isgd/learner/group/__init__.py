"""Several learners of one run: a process group in which each takes a share of every minibatch.

Rank 0 is the learner that every run has (``task.py``, ``learner/task.py``): it alone draws, publishes, commits and
reports. The other ranks (``follower.py``) receive the draws, train on their shares, and return their norms.
"""
