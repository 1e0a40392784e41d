//! The command line; each arm is one call to a running server.

mod chat;
mod client;
mod demo;
mod export;
mod follow;
mod inspect;
mod serve;
mod table;
mod train;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::error::{Error, Result};

use client::Client;

/// Serve a language model and align it at the same time.
#[derive(Parser)]
#[command(name = "rdpo", version, about, disable_help_subcommand = true)]
#[command(
    after_help = "Start with `rdpo serve`, then `rdpo chat` in another terminal. `make demo` shows the whole method."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve teacher, reward and student, and run jobs, until stopped
    Serve(serve::ServeArgs),
    /// Print the settings in force, secrets masked
    Config(serve::ServeArgs),
    /// Show the whole method on this machine: start a server, align its student, compare
    Demo(demo::DemoArgs),
    /// Start a refined-DPO job on a running server and follow it
    Train(train::TrainArgs),
    /// Let the teacher answer, criticize and revise for given prompts
    Synthesize(inspect::SynthesizeArgs),
    /// Score responses with the reward model
    Score(inspect::ScoreArgs),
    /// Talk to a model; one message from the arguments, or a conversation without any
    Chat(chat::ChatArgs),
    /// List what can be asked for
    Models(Remote),
    /// Look at jobs; cancel, pause, resume or follow one
    Jobs(inspect::JobsArgs),
    /// Copy a published adapter (PEFT files) to a folder
    Export(export::ExportArgs),
}

/// Which server to talk to.
#[derive(Args, Clone, Debug)]
pub(crate) struct Remote {
    /// Address of the server
    #[arg(long, env = "RDPO_URL", default_value = "http://127.0.0.1:8080", value_name = "URL")]
    url: String,
    /// Key of the server, where it asks for one
    #[arg(long, env = "RDPO_API_KEY", hide_env_values = true, value_name = "KEY")]
    api_key: Option<String>,
}

/// Parses the arguments and runs the command. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 server not reachable.
pub fn main() -> ExitCode {
    // Before there is a second thread that could read the environment.
    crate::kernels::cpu::keep_candle_on_one_thread();
    end_with_the_reader();
    let cli = Cli::parse();
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rdpo: {error}");
            ExitCode::from(if client::is_unreachable(&error) { 3 } else { 1 })
        }
    }
}

/// What is printed into a pipe that nobody reads any more (`rdpo models | head -1`) is no bug to report.
fn end_with_the_reader() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let text = panic.payload().downcast_ref::<String>().map_or("", String::as_str);
        if text.starts_with("failed printing to stdout") && text.contains("Broken pipe") {
            std::process::exit(0);
        }
        usual(panic);
    }));
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Serve(args) => serve::serve(&args),
        Command::Config(args) => serve::config(&args),
        Command::Demo(args) => blocking(demo::demo(&args)),
        Command::Train(args) => blocking(train::train(&args)),
        Command::Synthesize(args) => blocking(inspect::synthesize(&args)),
        Command::Score(args) => blocking(inspect::score(&args)),
        Command::Chat(args) => blocking(chat::chat(&args)),
        Command::Models(remote) => blocking(inspect::models(&remote)),
        Command::Jobs(args) => blocking(inspect::jobs(&args)),
        Command::Export(args) => blocking(export::export(&args)),
    }
}

fn blocking(work: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::internal(format!("cannot start the runtime: {error}")))?
        .block_on(work)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }
}
