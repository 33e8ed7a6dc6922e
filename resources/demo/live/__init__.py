"""The live demo's fleet: real servers and real HTTP around SIMULATED engines, on loopback."""
