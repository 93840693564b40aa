"""Many runs: the table that ends a sweep."""
