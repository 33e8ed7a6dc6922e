"""A small HTTP gateway for hosts without HAProxy: weights, drain and counters by the same few runtime commands.

It carries the live demo, not a fleet: one process, one pool, a connection per request. Where HAProxy is installed,
HAProxy is used.
"""
