"""FLOPs, memory and latency against resolution: planned, measured, recorded, resumed.

`points` plans, `walks` measures in processes of their own (`process`), `store` keeps the records.

A point is one mechanism at one size, in one mode, at one batch size; it becomes one record. The
points of a mechanism, mode and batch size make a walk from the smallest image up, in a fresh
process of its own, which reports each measurement when it has it: if it dies, for want of memory
for one, nothing else is harmed, and what it had reported is kept. A walk ends at the first point
that runs out of memory or of time; its larger points are recorded as skipped.

Multiply-adds need no device and are counted for skipped points too.
"""
