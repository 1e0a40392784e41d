//! `rdpo serve` and `rdpo config`: the settings, the roles, the server.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::config::{Overrides, Settings};
use crate::error::{Error, Result};
use crate::server::{AppState, ServerLimits, bind, run};
use crate::telemetry;

/// Settings of the server that flags can give.
#[derive(Args, Clone, Debug)]
pub(crate) struct ServeArgs {
    /// Settings file (default: rdpo.toml where it exists)
    #[arg(long, short, env = "RDPO_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address to listen on
    #[arg(long)]
    host: Option<String>,
    /// Port to listen on; 0 takes a free one
    #[arg(long)]
    port: Option<u16>,
}

impl ServeArgs {
    fn settings(&self) -> Result<Settings> {
        Settings::load(&Overrides { config: self.config.clone(), host: self.host.clone(), port: self.port })
    }
}

/// Prints what is in force.
pub(crate) fn config(args: &ServeArgs) -> Result<()> {
    print!("{}", args.settings()?.masked_toml()?);
    Ok(())
}

/// Serves until SIGTERM or Ctrl-C.
pub(crate) fn serve(args: &ServeArgs) -> Result<()> {
    telemetry::init_logging();
    let settings = args.settings()?;
    let listener = bind(&settings.server.host, settings.server.port)?;
    let address = listener.local_addr()?;
    let limits = ServerLimits {
        api_keys: settings.server.api_keys.clone(),
        max_body_bytes: settings.server.max_body_bytes,
        request_timeout: (settings.server.request_timeout > 0)
            .then(|| Duration::from_secs(settings.server.request_timeout)),
        drain: Duration::from_secs(settings.server.drain_seconds),
        trust_request_chat_template: settings.server.trust_request_chat_template,
    };
    let state = AppState::load(settings.roles(), &settings.store.path, limits)?;
    actix_web::rt::System::new().block_on(async {
        println!("rdpo {} listening on http://{address}", env!("CARGO_PKG_VERSION"));
        run(state, listener, stop_signal()).await
    })
}

async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut terminate) => {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
        }
        Err(error) => {
            tracing::warn!(error = %Error::from(error), "SIGTERM cannot be caught; Ctrl-C can");
            let _ = tokio::signal::ctrl_c().await;
        }
    }
}
