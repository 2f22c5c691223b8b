"""The methods by the names that `train(method=...)` takes."""

from ssl_fast.methods.simclr import SimCLR

METHODS = {"simclr": SimCLR}

__all__ = ["METHODS", "SimCLR"]
