"""The ledger of recommendations and the warehouse: reading its windows, deriving, keeping."""
