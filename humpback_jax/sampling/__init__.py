"""Generation and log-likelihoods."""
