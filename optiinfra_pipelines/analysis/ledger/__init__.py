"""The life of recommendations: what one look changes, what a change did, how right advice has been."""
