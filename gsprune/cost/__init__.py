"""What a network costs: parameters, MACs, milliseconds, tables of them, and budgets."""
