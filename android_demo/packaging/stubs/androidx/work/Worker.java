package androidx.work;

import android.content.Context;
import com.google.common.util.concurrent.ListenableFuture;

public abstract class Worker extends ListenableWorker {
    public Worker(Context context, WorkerParameters workerParams) {
        super(context, workerParams);
    }

    public abstract Result doWork();

    @Override
    public final native ListenableFuture<Result> startWork();
}
