"""What crosses the wire: records and keys, the flat buffer and its codecs, and the ledger of what left."""
