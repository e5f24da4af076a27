"""How work is spread over devices: the mesh, the rules table, attention, hardware peaks."""
