"""The activation between the two linear layers of a block's MLP."""
