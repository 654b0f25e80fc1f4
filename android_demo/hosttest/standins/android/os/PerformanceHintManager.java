package android.os;

import java.util.ArrayList;
import java.util.List;

/** Keeps what it is told. */
public final class PerformanceHintManager {
    public final List<Session> sessions = new ArrayList<>();

    public RuntimeException failure;

    public Session createHintSession(int[] tids, long initialTargetWorkDurationNanos) {
        if (failure != null) throw failure;
        Session session = new Session(tids, initialTargetWorkDurationNanos);
        sessions.add(session);
        return session;
    }

    public static class Session implements AutoCloseable {
        public final int[] tids;
        public final long target;
        public final List<Long> actual = new ArrayList<>();
        public boolean closed;

        Session(int[] tids, long target) {
            this.tids = tids;
            this.target = target;
        }

        public void reportActualWorkDuration(long actualDurationNanos) {
            actual.add(actualDurationNanos);
        }

        @Override
        public void close() {
            closed = true;
        }
    }
}
