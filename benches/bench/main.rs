//! Benchmarks.

mod engine;
mod quality;
mod train;

fn main() -> rdpo::error::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match arguments.split_first() {
        Some((first, rest)) if first == "engine-run" => engine::run(rest),
        Some((first, rest)) if first == "quality" => quality::run(rest),
        Some((first, rest)) if first == "train-run" => train::run(rest),
        _ => Ok(()),
    }
}
