package androidx.work;

import android.content.Context;
import com.google.common.util.concurrent.ListenableFuture;

public abstract class ListenableWorker {
    public ListenableWorker(Context appContext, WorkerParameters workerParams) {}

    public final native Context getApplicationContext();

    public final native Data getInputData();

    public final native int getRunAttemptCount();

    public final native boolean isStopped();

    public final native ListenableFuture<Void> setForegroundAsync(ForegroundInfo foregroundInfo);

    public abstract ListenableFuture<Result> startWork();

    public void onStopped() {}

    public abstract static class Result {
        public static native Result success();

        public static native Result retry();

        public static native Result failure();
    }
}
