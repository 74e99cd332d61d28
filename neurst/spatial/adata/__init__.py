"""The only place that touches the slots of an AnnData: names, reading, writing."""
