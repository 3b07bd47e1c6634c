//! The server: a thread that accepts connections, and what it was asked.

use std::{
    collections::HashMap,
    net::SocketAddr,
    pin::pin,
    sync::{Arc, atomic::Ordering},
    thread,
};

use futures_util::future::{Either, select};
use tokio::{net::TcpListener, runtime::Builder, sync::oneshot};

use crate::loopback::{
    connection::serve,
    manner::{Count, Manner, Shared},
};

/// A running server. It stops when dropped.
#[derive(Debug)]
pub struct Loopback {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Loopback {
    /// Starts a server on a free port of the loopback interface, on a thread of its own. `before`
    /// runs on that thread first.
    ///
    /// # Panics
    /// If the system has no port or no thread.
    pub fn start(manner: Manner, before: impl FnOnce() + Send + 'static) -> Self {
        let shared = Arc::new(Shared::new(manner));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("there is a free port");
        listener
            .set_nonblocking(true)
            .expect("a socket can be made non-blocking");
        let address = listener
            .local_addr()
            .expect("a bound socket has an address");
        let (stop, stopped) = oneshot::channel();
        let serving = shared.clone();
        let thread = thread::spawn(move || {
            before();
            let runtime = Builder::new_current_thread().enable_all().build();
            let runtime = runtime.expect("the process can start threads");
            runtime.block_on(accept(listener, serving, stopped));
        });
        Self {
            address,
            shared,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// `http://127.0.0.1:PORT/v1`.
    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// Requests so far.
    pub fn num_asked(&self) -> u64 {
        self.shared.num_asked.load(Ordering::Relaxed)
    }

    /// Bytes of the bodies of requests so far.
    pub fn num_bytes(&self) -> u64 {
        self.shared.num_bytes.load(Ordering::Relaxed)
    }

    /// Most requests that were under way at once.
    pub fn most_in_flight(&self) -> u64 {
        self.shared.most_in_flight.load(Ordering::Relaxed)
    }

    /// Requests by picture.
    pub fn pictures(&self) -> HashMap<u64, Count> {
        self.shared.pictures().clone()
    }
}

impl Drop for Loopback {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the server has been printed.
            let _ = thread.join();
        }
    }
}

async fn accept(
    listener: std::net::TcpListener,
    shared: Arc<Shared>,
    mut stopped: oneshot::Receiver<()>,
) {
    let listener = TcpListener::from_std(listener).expect("the socket is non-blocking");
    loop {
        let accepted = match select(pin!(listener.accept()), &mut stopped).await {
            Either::Left((accepted, _)) => accepted,
            Either::Right(_) => return,
        };
        if let Ok((stream, _)) = accepted {
            let shared = shared.clone();
            // A connection that ends in the middle is the client's affair.
            tokio::spawn(async move { drop(serve(stream, &shared).await) });
        }
    }
}
