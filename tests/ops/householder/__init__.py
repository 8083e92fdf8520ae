"""A package, so that its modules may have the names that other families give theirs."""
