"""What ships to production: bundles, engines, dispatch and the residual cache. docs/architecture.md lists the folders."""
