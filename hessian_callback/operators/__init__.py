"""The Hessian of a model as a symmetric operator."""
