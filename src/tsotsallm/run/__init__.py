"""A recipe executed: pass by pass, journaled after every layer, resumed after a kill."""
