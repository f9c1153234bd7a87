"""From stored images (folders, shards, data sets) to normalised batches on a device."""
