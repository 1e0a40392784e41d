//! The `rdpo` binary: parse the command line, run it, set the exit code.

fn main() -> std::process::ExitCode {
    rdpo::cli::main()
}
