"""What ships to production: bundles, engines, dispatch and the residual cache."""
