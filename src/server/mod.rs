//! HTTP: parse a request, call a role or a job, render the answer. Sees no tensor.
