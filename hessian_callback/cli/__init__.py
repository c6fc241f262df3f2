"""The command ``hessian-callback``."""
