"""What ships to production: bundles, engines, dispatch, residuals. docs/architecture.md lists its folders."""
