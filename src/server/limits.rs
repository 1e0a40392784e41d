//! When a request ends that would not end by itself: its time is up, or the server stops.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::error::{Code, Error, Result};

/// What a request hears whose time is up.
pub(super) fn timed_out(limit: Duration) -> Error {
    let text = format!("The answer was not there after {} s (`server.request_timeout`).", limit.as_secs_f64());
    Error::new(Code::TimedOut, text)
}

/// Waits for an answer, but no longer than `limit`; dropping the work frees what it held.
pub(super) async fn within<T>(limit: Option<Duration>, work: impl Future<Output = Result<T>>) -> Result<T> {
    match limit {
        None => work.await,
        Some(limit) => tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(timed_out(limit))),
    }
}

/// Stopping with grace: what comes is refused, what is being answered is waited for.
#[derive(Debug)]
pub(super) struct Drain {
    stopping: watch::Sender<bool>,
    in_flight: watch::Sender<usize>,
}

impl Default for Drain {
    fn default() -> Self {
        Drain { stopping: watch::Sender::new(false), in_flight: watch::Sender::new(0) }
    }
}

/// A request that is being answered, until it is dropped.
pub(super) struct InFlight(Arc<Drain>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.send_modify(|count| *count -= 1);
    }
}

impl Drain {
    /// Counts a request.
    pub(super) fn enter(self: &Arc<Self>) -> InFlight {
        self.in_flight.send_modify(|count| *count += 1);
        InFlight(self.clone())
    }

    /// 503 once the server stops.
    pub(super) fn check(&self) -> Result<()> {
        let text = "The server is stopping: ask another, or this one when it is back.";
        if *self.stopping.borrow() { Err(Error::new(Code::Overloaded, text)) } else { Ok(()) }
    }

    /// From now on new requests are refused.
    pub(super) fn begin(&self) {
        self.stopping.send_replace(true);
    }

    /// Resolves once the server stops.
    pub(super) async fn begun(&self) {
        // The sender lives as long as `self`.
        let _ = self.stopping.subscribe().wait_for(|stopping| *stopping).await;
    }

    /// Waits until all that is in flight has ended, at most so long; how many have not.
    pub(super) async fn end(&self, patience: Duration) -> usize {
        let mut in_flight = self.in_flight.subscribe();
        let _ = tokio::time::timeout(patience, in_flight.wait_for(|count| *count == 0)).await;
        *self.in_flight.borrow()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[actix_web::test]
    async fn who_is_in_flight_is_waited_for_and_nobody_else_comes() {
        let drain = Arc::new(Drain::default());
        let (first, second) = (drain.enter(), drain.enter());
        assert!(drain.check().is_ok());
        drain.begin();
        drain.begun().await;
        assert_eq!(drain.check().unwrap_err().status(), 503);
        drop(first);
        assert_eq!(drain.end(Duration::from_millis(20)).await, 1, "patience has an end");
        let waiting = drain.end(Duration::from_secs(60));
        let ends = async {
            actix_web::rt::task::yield_now().await;
            drop(second);
        };
        assert_eq!(futures_util::future::join(waiting, ends).await.0, 0);
    }

    #[actix_web::test]
    async fn time_is_up() {
        let limit = Some(Duration::from_millis(5));
        let error = within(limit, std::future::pending::<Result<()>>()).await.unwrap_err();
        assert_eq!((error.status(), error.code), (504, Code::TimedOut));
        assert_eq!(within(limit, async { Ok(1) }).await.unwrap(), 1);
        assert_eq!(within(None, async { Ok(2) }).await.unwrap(), 2);
    }
}
