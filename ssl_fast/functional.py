"""The functions of the ops' home pages."""

from ssl_fast.ops.nt_xent import nt_xent

__all__ = ["nt_xent"]
