package androidx.work;

import java.util.concurrent.TimeUnit;

public abstract class WorkRequest {
    public abstract static class Builder<B extends Builder<B, ?>, W extends WorkRequest> {
        public final native B setConstraints(Constraints constraints);

        public final native B setBackoffCriteria(BackoffPolicy backoffPolicy, long backoffDelay, TimeUnit timeUnit);

        public final native B setInputData(Data inputData);

        public final native W build();
    }
}
